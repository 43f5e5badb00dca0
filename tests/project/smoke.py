"""``make package`` runs this where nothing but the package and what it requires is installed."""

import torch
from torch import nn

import ltd_fx

layers = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4)))
scheduler = ltd_fx.LTDScheduler(4, 12, total_steps=2)
model = ltd_fx.transform(layers, scheduler)
print(ltd_fx.summary(model))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
kept = []
for _ in range(3):
    model(torch.randn(2, 12, 16)).square().mean().backward()
    kept.append({rows.shape[1] for rows in ltd_fx.sampled_indices(model).values()})
    optimizer.step()
    scheduler.step()
assert kept == [{4}, {8}, {12}]
assert ltd_fx.clean_state_dict(model).keys() == ltd_fx.restore(model).state_dict().keys()
