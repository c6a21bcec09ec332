--- A measured publisher: the same methods, and what they do as metrics.
--
-- `send` is timed each time. Of `send_async` one message at a time is: a small task waits for its confirm. What fails
-- is counted when it has failed for good, whoever hears of it; with `retry = false` only what `send` returns is.
-- @module moonrabbit.metrics.publisher

local Measured = {}

-- Other methods are the publisher's own.
local function delegate(self, name)
  local method = Measured[name]
  if method ~= nil then return method end
  local publisher = rawget(self, "_publisher")
  local theirs = publisher[name]
  if type(theirs) ~= "function" then return theirs end
  return function(_, ...) return theirs(publisher, ...) end
end

local gauges = { "publisher_unconfirmed", "publisher_bytes", "publisher_window", "outbox_messages" }

-- What a publisher that is closed held last is nothing that is there now.
local function leave_page(self)
  if not self._off then return end
  pcall(self._look)
  self._off()
  self._off = nil
  for _, gauge in ipairs(gauges) do self._families[gauge]:remove(self._name) end
end

local meta = {
  __index = delegate, __tostring = function(self) return tostring(self._publisher) end,
  __close = function(self)
    self._publisher:__close()
    leave_page(self)
  end,
}

local function failed(self, kind)
  self._families.publish_errors_total:with(self._name, kind):inc()
end

-- The keeper concludes what has failed for good: that is where it is counted, once.
local function listen(self)
  local keeper, seen = self._publisher._keeper, setmetatable({}, { __mode = "k" })
  self._seen = seen
  if not keeper then return end
  local conclude, acked = keeper._conclude, require("moonrabbit.core").acked
  function keeper._conclude(keeper_, n, outcome, err)
    local message, confirmation = keeper_.ring:at(n)
    if message and not acked(confirmation) then
      if err then seen[err] = true end
      failed(self, err and err.kind or outcome)
    end
    return conclude(keeper_, n, outcome, err)
  end
end

local function look(self)
  local families, name, publisher = self._families, self._name, self._publisher
  local stats, keeper = publisher:stats(), publisher._keeper
  families.publisher_unconfirmed:with(name):set(stats.unconfirmed)
  families.publisher_bytes:with(name):set(stats.bytes)
  families.outbox_messages:with(name):set(stats.stored)
  families.publishes_resent_total:with(name).value = stats.resent
  if keeper and keeper._most < math.huge then families.publisher_window:with(name):set(keeper._most) end
end

---@param publisher moonrabbit.Publisher
---@param name string  the label `publisher`; each publisher has its own
---@param families table<string, moonrabbit.metrics.Family>
---@param registry moonrabbit.metrics.Registry
---@return moonrabbit.Publisher
function Measured.new(publisher, name, families, registry)
  local self = setmetatable({
    _publisher = publisher, _name = name, _families = families, _runtime = publisher.channel._runtime,
    _sent = families.publishes_total:with(name), _seconds = families.publish_seconds:with(name), _timing = false,
  }, meta)
  listen(self)
  self._look = function() look(self) end
  self._off = registry:collect(self._look)
  return self
end

--- As Publisher:send.
function Measured:send(body, overrides)
  local now = self._runtime.now
  local started = now()
  local ok, err = self._publisher:send(body, overrides)
  if ok then
    self._sent:inc()
    self._seconds:observe(now() - started)
    return ok
  end
  if err.kind ~= "overflow" and err.kind ~= "blocked" and not err.unsent then self._sent:inc() end
  if not self._seen[err] then failed(self, err.kind) end
  return nil, err
end

local function time(self, confirmation, started)
  local ok = confirmation:wait(math.huge)
  if ok then self._seconds:observe(self._runtime.now() - started) end
  self._timing = false
end

--- As Publisher:send_async.
function Measured:send_async(body, overrides)
  local confirmation, err = self._publisher:send_async(body, overrides)
  if not confirmation then
    failed(self, err.kind)
    return nil, err
  end
  self._sent:inc()
  if not self._timing then
    self._timing = true
    self._runtime.spawn(time, self, confirmation, self._runtime.now())
  end
  return confirmation
end

--- As Publisher:close; what it held leaves the page, and its counters stay.
function Measured:close(timeout)
  local closed, err = self._publisher:close(timeout)
  leave_page(self)
  return closed, err
end

return Measured
