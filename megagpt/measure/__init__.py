"""One loss curve, shown: every engine beside one plain process, and what each holds in memory."""
