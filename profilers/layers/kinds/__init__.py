"""Everything that is known of each kind of layer, one file a kind."""
