-- What every Lua from 5.1 to 5.4 and LuaJIT has in common; what only some have is asked for by name.
std = "min"
max_line_length = 120
max_comment_line_length = false -- a type annotation cannot be broken
max_cyclomatic_complexity = 30
self = false
unused_args = true
ignore = { "212/_.*", "213/_.*" }
exclude_files = { "build/**", "**/*.d.lua", "**/node_modules/**" }

files["lua/moonrabbit/runtime/resty*.lua"] = { std = "+ngx_lua" }
files["lua/moonrabbit/runtime/resty/**/*.lua"] = { std = "+ngx_lua" }
files["lua/moonrabbit/resty*.lua"] = { std = "+ngx_lua" }
files["lua/moonrabbit/resty/**/*.lua"] = { std = "+ngx_lua" }
files["examples/openresty/**/*.lua"] = { std = "+ngx_lua" }
files["spec/**/*.lua"] = { std = "+busted", max_cyclomatic_complexity = false }
files["spec/resty/**/*.lua"] = { std = "+busted+ngx_lua" }
-- These run on one Lua, our own choice of it.
files["bench/**"] = { std = "max", max_cyclomatic_complexity = false }
files["bench/nginx_handlers.lua"] = { std = "+ngx_lua" }
files["chaos/**"] = { std = "lua54", max_cyclomatic_complexity = false }
files["scripts/*"] = { std = "lua54", max_cyclomatic_complexity = false }
files[".luacheckrc"] = { std = "+luacheckrc" }
files["*.rockspec"] = { std = "+rockspec" }
files["config.ld"] = { std = "+ldoc" }
