"""What the commands do.

Programs may import everything; nothing but the command line and the server imports them.
"""
