--- Publisher: a route prepared once, on a confirm channel of its own.
--
-- Exchange, routing key and properties are encoded when it is made; each send adds the body. Messages
-- are mandatory and persistent unless told otherwise, so that `true` means what it says: a queue has it.
-- @module moonrabbit.publisher

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"

---@class moonrabbit.PublisherOptions : moonrabbit.PublishOptions
---@field persistent boolean?   a durable queue keeps the messages on disk; true by default
---@field mandatory boolean?    a message that no queue takes comes back, as a failure of kind `unroutable`; true by default
---@field window integer?       the most messages that may be unconfirmed, counted from the oldest such; 65536 by default, 0: no bound
---@field timeout number?       seconds, of this call and of the publisher's; the connection's by default

---@class moonrabbit.Publisher
---@field channel moonrabbit.Channel its own
local Publisher = {}
Publisher.__index = Publisher
Publisher.__name = "moonrabbit.Publisher"

local publisher_options = options.merge(options.publish, {
  window = options.integer(0, 4294967295), timeout = options.seconds,
})
local send_options = options.merge(options.publish, { timeout = options.seconds })

--- Used by Connection:publisher.
---@package
function Publisher.new(connection, opts, level)
  level = level + 1
  opts = options.check("Connection:publisher", opts, publisher_options, level)
  local base = {}
  for key, value in pairs(opts) do
    if options.publish[key] then base[key] = value end
  end
  local route = core.route(base, true)
  local channel, err = connection:channel { confirm = true, window = opts.window, timeout = opts.timeout }
  if not channel then return nil, err end
  return setmetatable({ channel = channel, _base = base, _route = route }, Publisher)
end

-- The publisher's options with a message's own over them; headers are merged too.
local function with(self, overrides, level)
  options.check("Publisher:send", overrides, send_options, level + 1)
  local all = {}
  for key, value in pairs(self._base) do all[key] = value end
  for key, value in pairs(overrides) do all[key] = value end
  if overrides.headers and self._base.headers then
    all.headers = {}
    for key, value in pairs(self._base.headers) do all.headers[key] = value end
    for key, value in pairs(overrides.headers) do all.headers[key] = value end
  end
  return all
end

--- Sends and returns at once, as Channel:publish_async does.
---@param body string
---@param overrides moonrabbit.PublishOptions? as for Channel:publish, for this message; headers are merged
---@return moonrabbit.Confirmation|nil, moonrabbit.Error?
function Publisher:send_async(body, overrides)
  local channel = self.channel
  if overrides then
    local confirmation, err = channel:publish_async(body, with(self, overrides, 2))
    return confirmation, err
  end
  return channel:_publish_route(self._route, body)
end

--- Sends and waits for the broker's confirm, as Channel:publish does.
---@param body string
---@param overrides moonrabbit.PublishOptions? as for Channel:publish, for this message; headers are merged
---@return true|nil, moonrabbit.Error?
function Publisher:send(body, overrides)
  local channel = self.channel
  options.argument("Publisher:send", "body", body, options.string)
  if overrides then
    local ok, err = channel:publish(body, with(self, overrides, 2))
    return ok, err
  end
  return channel:_send_route(self._route, body)
end

--- Waits until everything sent is settled: true, or nil, err with err.failed, as
--- Channel:wait_for_confirms.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Publisher:wait(timeout)
  if timeout ~= nil then options.argument("Publisher:wait", "timeout", timeout, options.seconds) end
  local ok, err = self.channel:wait_for_confirms(timeout)
  return ok, err
end

--- How many messages are not settled yet.
---@return integer
function Publisher:unconfirmed()
  return self.channel:unconfirmed()
end

--- Closes its channel; wait() before, or the outcome of what is under way stays unknown.
---@param timeout number? seconds
---@return true|nil, moonrabbit.Error?
function Publisher:close(timeout)
  return self.channel:close(timeout)
end

function Publisher:__tostring()
  return ("%s to '%s' '%s'"):format(Publisher.__name, self._base.exchange or "", self._base.routing_key or "")
end

function Publisher:__close()
  self.channel:__close()
end

return Publisher
