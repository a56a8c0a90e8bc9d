"""Finding an object without labels by how patches agree: LOST (Siméoni et al., BMVC 2021)."""
