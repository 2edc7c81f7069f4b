"""How the bundled demo checkpoints are made and measured: their corpus, vocabulary, training and evaluation."""
