"""Rewrite a model in place, all or nothing, and back: which layers, their classes, the hooks around a forward.

It also answers where the rewritten layers are now, and reports what was done.
"""

from ltd_fx.install.attach import attach, complete
from ltd_fx.install.choose import RouteSpec, check_free
from ltd_fx.install.graph_module import put_site
from ltd_fx.install.hooks import add_root_hook
from ltd_fx.install.in_place import Rewrite, find_rewrite, find_rewrite_maybe, find_scheduler, install, uninstall
from ltd_fx.install.outlined import outlined
from ltd_fx.install.report import RewriteReport, VerifyReport
from ltd_fx.install.settings import Settings
from ltd_fx.install.unflattened import adopt, flattened, is_unflattened
from ltd_fx.install.warm_up import warm_up
