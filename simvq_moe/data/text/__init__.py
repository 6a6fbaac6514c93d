"""From documents of files and data sets to windows of token ids; never how a model scores them."""
