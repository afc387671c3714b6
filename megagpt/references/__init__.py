"""Numbers of the papers and of OpenAI's checkpoints, each with its convention and its source."""
