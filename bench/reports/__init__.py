"""What was measured, as one document: kept as JSON, told as Markdown and as a page, compared with another."""
