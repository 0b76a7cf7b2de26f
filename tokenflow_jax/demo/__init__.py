"""A page in the browser to try checkpoints: codes of a picture, drawing, editing, a chat."""
