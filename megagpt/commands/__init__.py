"""One module for each group of commands. A command imports what it needs only when it runs, so that help is fast."""
