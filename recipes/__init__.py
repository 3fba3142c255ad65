"""Ready-made tasks: LightningModules, data modules and the YAML files that train them."""
