"""One file per public data set, named in `config.plugs.SOURCES`: its `SET` says where it is and what a row becomes."""
