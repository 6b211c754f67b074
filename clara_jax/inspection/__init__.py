"""What memories hold: the logit lens, and the plane of mean memory and document states."""
