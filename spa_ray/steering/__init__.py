"""Models that were trained on prompts that say which scores an answer is to have: sensing them, and asking for them.

`asking` decides what a prompt is asked for, `sensor` reads the scores off a prompt by the model's own head, and `actor`
does both in front of the engines of a pass. A method is known by `Method`'s protocol alone.
"""
