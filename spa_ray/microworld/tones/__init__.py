"""The scored world `tones`: prompts that carry wishes, answers with a style, and an oracle of five scores in [0, 1].

It shares the first world's topics and questions. Configs name its readers and judges by dotted path.
"""
