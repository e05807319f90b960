"""Jobs: recipes that run on a Ray cluster without their submitter, who may leave and come back."""
