"""An independent PyTorch statement of the reference's computation.

It exists only for the tests: it recomputes recorded cases (``check``) and
records new ones in the same format (``record``).  It shares no code with the
JAX package.
"""
