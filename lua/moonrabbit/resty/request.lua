--- What belongs to one request or timer: a connection of its own, and the request's body.
-- @module moonrabbit.resty.request

local Connection = require "moonrabbit.connection"
local errors = require "moonrabbit.errors"
local phases = require "moonrabbit.resty.phases"
local runtime = require "moonrabbit.runtime.resty"

local request = {}

local function with_runtime(given, what, level)
  if type(given) == "string" then given = { uri = given } end
  if type(given) ~= "table" then error(what .. ": a URI or a table of options expected", level + 1) end
  if given.runtime ~= nil then error(what .. ": unknown option 'runtime' (this is the resty runtime)", level + 1) end
  local all = { runtime = runtime, reconnect = false }
  for key, value in pairs(given) do all[key] = value end
  return all
end

--- A connection over a cosocket, for the caller alone.
---@param what string who asks
---@param opts string|moonrabbit.ConnectOptions
---@param level integer of the caller
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function request.connect(what, opts, level)
  phases.check_waiting(what, nil, level + 1)
  local connection, err = Connection.connect(with_runtime(opts, what, level + 1), level + 1)
  return connection, err
end

--- The body of the current request.
---@param what string who asks
---@param level integer of the caller
---@return string|nil, moonrabbit.Error?
function request.body(what, level)
  phases.check_waiting(what, nil, level + 1)
  ngx.req.read_body()
  local body = ngx.req.get_body_data()
  if body then return body end
  if not ngx.req.get_body_file() then return "" end
  return nil, errors.new {
    kind = "overflow", temporary = false,
    message = "nginx has buffered the request body to disk: raise client_body_buffer_size to client_max_body_size",
  }
end

return request
