--- A route that is encoded once, for the many messages that take it.
-- @module moonrabbit.resty.publisher

local options = require "moonrabbit.options"
local phases = require "moonrabbit.resty.phases"
local routes = require "moonrabbit.resty.routes"

local check_body, route = routes.check_body, routes.route
local started = require("moonrabbit.resty.default").client

---@class moonrabbit.resty.Publisher
local Publisher = {}
Publisher.__index = Publisher

local function with(self, what, overrides, level)
  options.check(what, overrides, routes.options, level + 1)
  local all = {}
  for key, value in pairs(self._base) do all[key] = value end
  for key, value in pairs(overrides) do all[key] = value end
  if overrides.headers and self._base.headers then
    all.headers = {}
    for key, value in pairs(self._base.headers) do all.headers[key] = value end
    for key, value in pairs(overrides.headers) do all.headers[key] = value end
  end
  return route(what, all, level + 1)
end

-- client: nil for the default one, whenever it starts.
function Publisher._new(client, what, opts, level)
  if opts ~= nil then options.check(what, opts, routes.options, level + 1) end
  local base = {}
  for key, value in pairs(opts or {}) do base[key] = value end
  return setmetatable({ _client = client, _base = base, _route = route(what, base, level + 1) }, Publisher)
end

--- Sends and waits for the confirm, as `publish` does.
---@param body string
---@param overrides moonrabbit.PublishOptions? for this message; headers are merged
---@return true|nil, moonrabbit.Error?
function Publisher:send(body, overrides)
  check_body("Publisher:send", body, 2)
  phases.check_waiting("Publisher:send", "send_async is for every phase", 2)
  local client = self._client or started("Publisher:send", 2)
  local made = overrides and with(self, "Publisher:send", overrides, 2) or self._route
  local ok, err = client._outbound:publish(body, made,
    overrides and overrides.timeout or self._base.timeout or client.timeout)
  return ok, err
end

--- Puts a message into the queue and returns, as `publish_async` does.
---@param body string
---@param overrides moonrabbit.PublishOptions? for this message; headers are merged
---@return true|nil, moonrabbit.Error?
function Publisher:send_async(body, overrides)
  check_body("Publisher:send_async", body, 2)
  local client = self._client or started("Publisher:send_async", 2)
  local made = overrides and with(self, "Publisher:send_async", overrides, 2) or self._route
  local ok, err = client._outbound:publish_async(body, made)
  return ok, err
end

return Publisher
