"""What decides an answer: its options, the choice of each token, its end, its text, and the steps callers see."""
