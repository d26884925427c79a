"""The serving side of Nowcast: neural graphs, the NiNo engine and the HTTP service around them."""
