"""One module for each group of commands. They import what they run only when it runs, so that help is fast."""
