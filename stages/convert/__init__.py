"""A fine-tune of a converted teacher becomes a flow model by what it changed of that teacher; `sollune convert`."""
