"""What MkDocs calls while it makes the pages (`hooks` of mkdocs.yml); explained in nbs/runs/16_site.ipynb."""
from gears_nb.runs.site import on_config, on_page_content, on_post_build

__all__ = ["on_config", "on_page_content", "on_post_build"]
