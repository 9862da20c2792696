"""Evidence about each layer, head, neuron and hidden channel, and the scores made of it."""
