"""Everything here runs inside the target's interpreter, never in the judge's.

It is started by path, so it must not import anything from the judge's side; it speaks the syntax of
Python 3.9, needs only the standard library until the model is imported, then torch and numpy.
"""
