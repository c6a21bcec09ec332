--- Two sites: a primary and a standby. The connection goes to the standby once the primary has been unreachable for
-- some time, and back once it has been healthy for some time.
--
-- While a `check` of the standby has not said yes, publishing is held there: publishes answer `blocked` at once, and
-- consuming goes on. So a program may watch a standby site without two sites taking orders.
--
-- A site is a source of targets of its own (list or smart); this one asks the right one in each round.
-- @module moonrabbit.cluster.sites

local described = require "moonrabbit.described"
local protect = require "moonrabbit.protect"
local random = require "moonrabbit.random"

-- Connections that lost a primary together come to the standby within so much of `after`.
local SPREAD = 0.1

-- A connection that takes another's place believes it that the primary is down if it was seen so within these seconds.
local UNSEEN = 15

---@class moonrabbit.cluster.Sites
local Sites = {}
Sites.__index = Sites

-- ---- Rounds -----------------------------------------------------------------------------------------

local function add_targets(self, name, list)
  local targets, err = self.sources[name]:round()
  for _, target in ipairs(targets or {}) do
    self.site_of[target] = name
    list[#list + 1] = target
  end
  return err
end

-- How long the primary has been unreachable.
local function outage(self)
  return self.down_since and self.runtime.now() - self.down_since or 0
end

local function is_down(self)
  local now = self.runtime.now()
  self.down_since, self.seen_down, self.unseen = self.down_since or now, now, nil
end

-- The sites to try, in their order. On the first connect there is nothing to wait for. Who has been on the standby and
-- lost it takes whichever is there. The primary may be back where nobody has tried it for some time.
local function order(self)
  if self.wanted then return { self.wanted } end
  if self.current == "standby" then return { "standby", "primary" } end
  if self.current == nil then return { "primary", "standby" } end
  if outage(self) < self.after then return { "primary" } end
  if self.unseen then return { "primary", "standby" } end
  return { "standby", "primary" }
end

function Sites:round()
  local list, err, sites = {}, nil, order(self)
  for _, name in ipairs(sites) do
    local problem = add_targets(self, name, list)
    err = err or problem
  end
  self.wanted, self.partial = nil, #sites < 2 or err ~= nil and err.temporary
  if #list == 0 then
    if self.current ~= "standby" then is_down(self) end
    if err then err.temporary = true end -- the other site has its turn
    return nil, err
  end
  return list
end

--- When the standby has its turn: a little later for some than for others, who lost the primary with them.
function Sites:due()
  local left = self.after - outage(self)
  if self.current ~= "primary" or not self.down_since or left <= 0 then return nil end
  return left * (1 + SPREAD * random.number())
end

function Sites:failed(target, err)
  local name = self.site_of[target]
  if name == "primary" then is_down(self) end
  self.sources[name]:failed(target, err)
  -- A site that refuses us for good is one that is down, as long as there is another: the round must not end everything.
  if self.partial then err.temporary = true end
end

function Sites:lost(target, err, unrestored)
  local name = self.site_of[target]
  -- A site that takes connections and lets nothing be restored is as unreachable as it was before.
  if name == "primary" then
    self.down_since = unrestored and self.was_down or nil
    is_down(self)
  end
  self.sources[name]:lost(target, err, unrestored)
  self.session = nil
  self.changed:broadcast()
end

-- ---- Publishing on the standby ----------------------------------------------------------------------

local function hold_publishing(self, session)
  session.held = ("publishing is held: site '%s' is consume-only until its check releases it"):format(self.current)
  session.engine:hold(true)
end

--- Publishing is open on the site that is connected to.
function Sites:release()
  if self.released then return end
  self.released = true
  local session = self.session
  if session then
    session.held = nil
    session.engine:hold(false)
    session.room:signal()
    for channel in pairs(session.channels) do channel._room:signal() end
  end
  self.log("info", ("publishing is released at site '%s'"):format(self.current))
  self.emit("released", self.current)
end

-- What the check of a site says of a connection to it: true; or nil, why.
local function passes(self, name, connection)
  local check = self.checks[name]
  if not check then return true end
  local whole, fit, why = protect(check, connection)
  if not whole then
    if fit ~= nil and fit == self.runtime.cancelled then error(fit, 0) end
    self.log("error", ("the check of site '%s' threw: %s"):format(name, described(fit)))
    return nil, described(fit)
  end
  if fit then return true end
  return nil, why and described(why) or "the check did not say yes"
end

local function ask_for_release(self)
  if self.released then return end
  local session = self.session
  if not self.connection:wait_open(self.every) then return end
  local fit, why = passes(self, self.current, self.connection)
  if session ~= self.session or self.released then return end
  if fit then
    self:release()
  elseif why ~= self.held_because then
    self.held_because = why
    self.log("info", ("publishing is held at site '%s': %s"):format(self.current, why))
    self.emit("held", why)
  end
end

-- ---- Back to the primary ----------------------------------------------------------------------------

-- A connection to the primary; nil, err. Closing the source ends this wait.
local function dial(self)
  self.dialling = true
  local whole, connection, err = protect(self.dial_primary, self.sources.primary)
  self.dialling = false
  if not whole then error(connection, 0) end
  return connection, err
end

-- Whether the primary takes us, and its check says yes: true; or nil, why.
local function probe(self)
  local connection, err = dial(self)
  if not connection then return nil, err end
  self.probing = connection
  local whole, fit, why = protect(passes, self, "primary", connection)
  self.probing = nil
  if not whole then -- the task was cancelled
    connection:__close()
    error(fit, 0)
  end
  connection:close(self.probe_timeout)
  return fit, why
end

-- The primary has been healthy since `healthy_since`, without a gap.
local function look_after_primary(self)
  local fit = probe(self)
  if not fit then
    self.healthy_since = nil
    return
  end
  local now = self.runtime.now()
  self.healthy_since = self.healthy_since or now
  if now - self.healthy_since >= self.hold and self.session and self.current == "standby" then
    self.healthy_since, self.wanted = nil, "primary"
    self.move("the primary site is healthy again")
  end
end

local function is_away(self) return not self.closed and self.current == "standby" end

local function look(self)
  if self.session then ask_for_release(self) end
  if self.hold < math.huge and is_away(self) then look_after_primary(self) end
end

local function watch(self)
  while is_away(self) do
    -- What throws in there must not keep the connection at the standby for ever.
    local whole, err = protect(look, self)
    if not whole then
      if err == self.runtime.cancelled then error(err, 0) end
      self.healthy_since = nil
      self.log("error", "looking after the primary site threw: " .. described(err))
    end
    if is_away(self) then self.changed:wait(self.every) end
  end
end

local function keep_watching(self)
  local whole, err = protect(watch, self)
  self.watching = nil
  if not whole then error(err, 0) end
end

local function start_watching(self)
  if self.watching then return end
  self.watching = self.runtime.spawn(keep_watching, self)
end

function Sites:connected(target, session)
  local name = self.site_of[target]
  self.sources[name]:connected(target, session)
  self.session = session
  local before = self.current
  if before ~= name then
    self.current, self.released, self.held_because, self.healthy_since = name, self.checks[name] == nil, nil, nil
    if name == "primary" then self.released = true end
    if before or name ~= "primary" then
      self.log("warn", ("this connection is now to site '%s'"):format(name))
      self.emit("site", name, before)
    end
  end
  if name == "primary" then
    self.was_down, self.down_since = self.down_since, nil
  else
    if not self.released then hold_publishing(self, session) end
    start_watching(self)
  end
end

function Sites:close()
  self.closed = true
  self.changed:broadcast()
  if self.dialling then self.runtime.cancel(self.watching) end
  if self.probing then self.probing:__close() end -- what its check waits for ends with it
  for _, source in pairs(self.sources) do source:close() end
end

--- The connection that it serves.
---@param hooks { emit: function, move: function, connection: table, dial_primary: fun(source: table): table|nil, moonrabbit.Error? }
function Sites:attach(hooks)
  self.emit, self.move, self.connection, self.dial_primary = hooks.emit, hooks.move, hooks.connection,
    hooks.dial_primary
  for _, source in pairs(self.sources) do source:attach(hooks) end
end

---@param sources { primary: table, standby: table }
---@param opts moonrabbit.SitesOptions
---@param context table { runtime, log, past }
function Sites.new(sources, opts, context)
  local past, after = context.past or {}, opts.after or 30
  local seen_down = past.seen_down
  local all = {} -- what both list, whose heartbeats a detector asks for
  for _, name in ipairs { "primary", "standby" } do
    for _, target in ipairs(sources[name].targets) do all[#all + 1] = target end
  end
  return setmetatable({
    sources = sources, targets = all, runtime = context.runtime, log = context.log,
    after = after, hold = opts.hold or 60, every = opts.probe or 5, probe_timeout = 5,
    checks = { primary = opts.primary.check, standby = opts.standby.check },
    current = past.current, released = past.released, down_since = past.down_since, wanted = past.wanted,
    seen_down = seen_down, unseen = seen_down and context.runtime.now() - seen_down > math.min(after, UNSEEN) or nil,
    site_of = setmetatable({}, { __mode = "k" }), changed = context.runtime.condition(),
    emit = function() end, move = function() end,
  }, Sites)
end

return Sites
