"""What `make canary` and `make matrix` add to pytest; the suite itself is the tests marked `compat`."""

PACKAGES = ("torch", "transformers", "accelerate", "peft", "timm", "torchvision", "lightning", "diffusers")
