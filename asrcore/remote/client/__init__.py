"""The side of the engine: the roles of a site that is served elsewhere."""
