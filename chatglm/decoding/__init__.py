"""How an answer is decoded: options, the choice of each token, stopping, text, and the steps that callers see."""
