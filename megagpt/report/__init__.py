"""Pictures of runs, and the page that shows one to others."""
