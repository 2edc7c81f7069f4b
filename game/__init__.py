"""Lateral-thinking puzzles: the player asks, the host answers yes, no or irrelevant.

`puzzles.py` reads them, the referees judge the player's lines (`referee.py`, `keyword_referee.py`), `rounds.py` keeps a
round without any input or output, `terminal.py` and `page.py` are the two ways to play.
"""
