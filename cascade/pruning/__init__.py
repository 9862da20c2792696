"""From importance to a smaller model: score, choose, cut, repair; and the proof that the cut is what the plan says."""
