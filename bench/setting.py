"""What a run was made on: the machine before its first round, after its last, and what else it did meanwhile."""

from __future__ import annotations

import os
from datetime import datetime, timezone

from .machine import clock_mhz, machine_facts
from .other_work import look, other_cores
from .probes import probes_here
from .reports.schema import Machine


def load_average() -> float:
    """The average load of the last minute."""
    return round(os.getloadavg()[0], 2)


class Watch:
    """Looks at the machine when it is made, and again when it is asked, when all that was started has ended.

    probes: what of the machine is looked at while contenders have their turns.
    """

    def __init__(self, load: float) -> None:
        """load: the average before anything was begun, such as the export of what is measured."""
        self.began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.probes = probes_here()
        self._facts, self._clock = machine_facts(), clock_mhz()
        self._load, self._look = load, look()

    def machine(self) -> Machine:
        """The machine, before and now."""
        facts = self._facts
        return Machine(
            processor=facts["processor"],
            cores=facts["cores"],
            memory_gib=facts["memory_gib"],
            devices=tuple(facts["nvidia_devices"]),
            system=facts["system"],
            python=facts["python"],
            versions=facts["versions"],
            clock_mhz=self.probes.clock_mhz or (self._clock, clock_mhz()),
            load_average=(self._load, load_average()),
            other_cores=other_cores(self._look, look()),
            energy=self.probes.told,
        )
