"""One declarative file per model family: where its blocks, attentions, streams, grid and guidance branches are."""
