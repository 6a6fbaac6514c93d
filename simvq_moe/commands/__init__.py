"""One function a command: its flags, and the room that does the work, imported when it is needed.
No work is done here.
"""
