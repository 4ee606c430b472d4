"""What a run was made on: the machine before its first round and after its last."""

from __future__ import annotations

import os
from datetime import datetime, timezone

from .machine import clock_mhz, machine_facts
from .reports.schema import Machine


class Watch:
    """Looks at the machine when it is made, and again when it is asked."""

    def __init__(self) -> None:
        self.began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._facts, self._clock = machine_facts(), clock_mhz()

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
            clock_mhz=(self._clock, clock_mhz()),
            load_average=(facts["load_average"], round(os.getloadavg()[0], 2)),
        )
