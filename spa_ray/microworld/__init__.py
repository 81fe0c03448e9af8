"""The microworld: a small invented world with an oracle, in which SPA's claims can be tested on a laptop.

Nobody in the package imports it: configs and the demo name it by dotted path. Harm is fictional throughout
(curses and runes of a made-up village); nothing here teaches real harm.
"""
