--- What all the Luas of one worker process share: with `lua_code_cache off` nginx makes one for each request.
-- @module moonrabbit.resty.process

local ffi = require "ffi"

pcall(ffi.cdef, "int setenv(const char *name, const char *value, int overwrite);")

local process = {}

-- Not of another process: a worker inherits its master's environment.
local function key() return "MOONRABBIT_RESTY_" .. ngx.worker.pid() end

--- Says that a client was started in this process.
function process.mark_started() ffi.C.setenv(key(), "started", 1) end

--- Whether one was started in this process, in whichever Lua. The first time that it was so in another one, a
--- warning goes to the log.
function process.is_started()
  local state = os.getenv(key())
  if state == "started" then
    ffi.C.setenv(key(), "warned", 1)
    ngx.log(ngx.WARN, "moonrabbit: lua_code_cache is off: requests cannot reach the connection of their worker")
  end
  return state ~= nil
end

return process
