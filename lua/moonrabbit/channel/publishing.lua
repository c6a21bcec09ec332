--- The methods of a channel that publish. What becomes of it is in channel/confirms.lua.
-- @module moonrabbit.channel

local options = require "moonrabbit.options"
local trace = require "moonrabbit.trace"

local argument, seconds = options.argument, options.seconds

---@class moonrabbit.PublishOptions
---@field exchange string?          "" by default: the routing key is the name of a queue
---@field routing_key string?       "" by default
---@field mandatory boolean?        a message that no queue takes comes back, as a failure of kind `unroutable`; true by default on a confirm channel, else false
---@field persistent boolean?       a durable queue keeps the message on disk; true by default on a confirm channel, else false
---@field headers table?            names to values: strings, numbers, booleans, lists, tables, `moonrabbit.null`, `moonrabbit.types`
---@field message_id string?        for consumers, to tell a message that comes twice
---@field correlation_id string?    of a reply: which request it answers
---@field reply_to string?          the queue that a reply is to go to
---@field content_type string?      a MIME type
---@field content_encoding string?  such as "gzip"
---@field expiration (string|number)?  milliseconds after which a queue drops the message
---@field priority integer?         0 to 255, in a queue with `x-max-priority`
---@field timestamp (integer|userdata)?  seconds since 1970, or a `types.timestamp`
---@field type string?              what kind of message it is, for the application
---@field user_id string?           the broker refuses any but the connection's user
---@field app_id string?            the application that publishes
---@field cluster_id string?        deprecated by AMQP
---@field delivery_mode integer?    1: transient, 2: persistent; over `persistent`
---@field timeout number?           seconds; the channel's by default

---@class moonrabbit.Channel
local Channel = {}

-- The engine's methods, taken from the first channel.
local core_publish, core_publish_route, core_forward

--- Takes them.
---@package
function Channel._bind(_, core_channel)
  core_publish = core_publish or core_channel.publish
  core_publish_route = core_publish_route or core_channel.publish_route
  core_forward = core_forward or core_channel.forward
end

-- ---- Waiting for room -------------------------------------------------------------------------------

-- Publishing as a function of (channel, x, y), so that waiting for room knows what to repeat.
local function publish_again(self, opts, body)
  return core_publish(self._core, body, opts)
end

local function route_again(self, route, body)
  return core_publish_route(self._core, route, body)
end

-- What a publish that was refused waits for. The window belongs to the channel; room in the buffer and
-- connection.blocked to the session; a channel.flow arrives like the latter.
local function condition_for(self, status)
  return status == "window" and self._room or self._session.room
end

-- The engine refused: waits for what it lacks, within `timeout`, and tries again.
local function publish_slow(self, again, x, y, status, timeout, level)
  local now = self._runtime.now
  local deadline
  local confirmation, flush
  repeat
    local session = self._session -- another one, once the connection was lost and is back
    if status == "closed" then return nil, self:_closed_error() end
    if status == "blocked" and session.held then return nil, session:error("blocked", session.held) end
    if status ~= "window" and status ~= "overflow" and status ~= "blocked" then
      return nil, session:refusal(status, "publish", level + 1)
    end
    if not deadline then
      timeout = timeout or self.timeout
      argument("publish", "option 'timeout'", timeout, seconds, level + 1)
      deadline = now() + timeout
    end
    session.corked = false
    session:try_flush()
    local left = deadline - now()
    if left <= 0 then
      local err = session:refusal(status, "publish")
      if timeout > 0 then err.message = err.message .. (" (for %g s)"):format(timeout) end
      return nil, err
    end
    local condition = condition_for(self, status)
    session:block(condition, left)
    confirmation, flush = again(self, x, y)
    session = self._session
    if confirmation then
      if flush then session:try_flush() else session:touch() end
      condition:signal() -- there may be room for the next one too
      return confirmation
    end
    status = flush
    if condition_for(self, status) ~= condition then condition:signal() end -- what woke it is of use to others
  until false
end

-- ---- Publishing -------------------------------------------------------------------------------------

local function check_publish(body, opts, level)
  if type(body) ~= "string" then
    error("publish: the body must be a string, not a " .. type(body), level + 1)
  end
  if opts ~= nil and type(opts) ~= "table" then
    error("publish: opts must be a table, not a " .. type(opts), level + 1)
  end
end

--- Publishes and returns at once; the Confirmation tells later how it ended. On a channel without
--- confirms it returns true. Bytes leave with the next turn of the event loop, or when 256 KiB are
--- waiting: in a plain script that does nothing else, call `wait`, `wait_for_confirms` or `flush`.
--- It waits only where there is no room: the window is full, the buffer is full, or the broker has
--- blocked publishing; `err.kind` is then `overflow` or `blocked` after `timeout` (0: it never waits), and
--- nothing was sent.
--- basic.publish, https://www.rabbitmq.com/docs/confirms#publisher-confirms
---@param body string
---@param opts moonrabbit.PublishOptions? as for Channel:publish
---@return moonrabbit.Confirmation|true|nil confirmation, moonrabbit.Error?
function Channel:publish_async(body, opts)
  if trace.on then opts = trace.add(self._runtime, opts) end
  local confirmation, flush = core_publish(self._core, body, opts)
  if confirmation then
    local session = self._session
    if flush then
      session:try_flush()
    elseif not session.dirty then
      session:touch()
    end
    return confirmation
  end
  local err
  confirmation, err = publish_slow(self, publish_again, opts, body, flush, opts and opts.timeout, 2)
  return confirmation, err
end

--- Publishes and waits for the broker's confirm: true once a queue has the message (and, where it is
--- durable and the message persistent, has it on disk). On a channel without confirms it returns as
--- soon as the message is on its way.
--- err.kind: `nacked`, `unroutable` (with the broker's code and text), `timeout` (unknown: the
--- message may arrive), `closed` or `channel` (unknown), `overflow`, `blocked` (not sent).
---@param body string any bytes
---@param opts moonrabbit.PublishOptions?
---@return true|nil, moonrabbit.Error?
function Channel:publish(body, opts)
  check_publish(body, opts, 2)
  if trace.on then opts = trace.add(self._runtime, opts) end
  local timeout = opts and opts.timeout
  if timeout then argument("Channel:publish", "option 'timeout'", timeout, seconds) end
  local confirmation, flush = core_publish(self._core, body, opts)
  if confirmation then
    if confirmation == true then
      if flush then self._session:try_flush() else self._session:touch() end
      return true
    end
    return self:_wait(confirmation, timeout, true)
  end
  local now = self._runtime.now
  timeout = timeout or self.timeout
  local deadline = now() + timeout
  local err
  confirmation, err = publish_slow(self, publish_again, opts, body, flush, timeout, 2)
  if not confirmation then return nil, err end
  if confirmation == true then return true end
  return self:_wait(confirmation, math.max(0, deadline - now()), true)
end

--- Publishes through a prepared route (core.route); used by Publisher.
---@package
function Channel:_publish_route(route, body, timeout)
  local confirmation, flush = core_publish_route(self._core, route, body)
  if confirmation then
    local session = self._session
    if flush then
      session:try_flush()
    elseif not session.dirty then
      session:touch()
    end
    return confirmation
  end
  return publish_slow(self, route_again, route, body, flush, timeout, 3)
end

--- Publishes through a prepared route and waits for the confirm, all within the channel's timeout.
---@package
function Channel:_send_route(route, body)
  local now = self._runtime.now
  local deadline = now() + self.timeout
  local confirmation, err = self:_publish_route(route, body)
  if not confirmation then return nil, err end
  return self:_wait(confirmation, math.max(0, deadline - now()), true)
end

--- Sends a message on; used by Message:forward.
---@package
function Channel:_forward(message, exchange, routing_key, opts, timeout)
  local mandatory = opts.mandatory
  if mandatory == nil then mandatory = self.confirm end
  local function again()
    return core_forward(self._core, message, exchange, routing_key, mandatory, opts.set, opts.remove,
      opts.remove_properties)
  end
  local confirmation, flush = again()
  if confirmation then
    if flush then self._session:try_flush() else self._session:touch() end
    return confirmation
  end
  return publish_slow(self, again, nil, nil, flush, timeout, 3)
end

return Channel
