"""`megagpt <command>`: a module for each door. Rooms are imported on use, so that help is instant."""
