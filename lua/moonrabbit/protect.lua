--- `pcall` that what it calls may yield through, on every Lua and in every runtime. Only PUC Lua 5.1
--- needs help; finding that out by trying would itself yield where nginx has replaced the coroutines.
-- @module moonrabbit.protect

if _VERSION == "Lua 5.1" and not rawget(_G, "jit") then return require("moonrabbit.runtime.pcall").pcall end
return pcall
