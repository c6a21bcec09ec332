--- A de-duplication store in the memory of this process: bounded, and forgotten with it.
--
--     dedupe = mr.dedupe.memory { ttl = 3600, max = 100000 }
--
-- When it is full, the keys that were done longest ago are forgotten before their time; the first time that happens is
-- worth a larger `max`, and `evicted` counts them. Claims are never forgotten before their lease ends: with nothing but
-- claims it refuses new ones, with an error of kind `overflow`.
-- @module moonrabbit.app.dedupe.memory

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"

local memory = {}

---@class moonrabbit.dedupe.Memory
---@field evicted integer keys that were forgotten before their time
local Store = {}
Store.__index = Store

local TTL, MAX = 3600, 100000

---@class moonrabbit.dedupe.MemoryOptions
---@field ttl number?   seconds that a key is remembered after its commit; 3600 by default
---@field max integer?  the most keys; 100,000 by default
---@field now (fun(): number)?  a clock, in seconds; the runtime's by default

local store_options = { ttl = options.seconds, max = options.integer(1, 1000000000), now = options.callback }

--- Makes one.
---@param opts moonrabbit.dedupe.MemoryOptions?
---@param level integer?
---@return moonrabbit.dedupe.Memory
function memory.new(opts, level)
  level = (level or 1) + 1
  opts = options.check("dedupe.memory", opts, store_options, level)
  if opts.ttl == 0 then error("dedupe.memory: option 'ttl' must be more than 0", level) end
  return setmetatable({
    ttl = opts.ttl or TTL, max = opts.max or MAX, now = opts.now or os.time, own_clock = opts.now ~= nil, evicted = 0,
    claims = {}, running = 0,          -- key -> when its lease ends
    done = {}, order = {}, first = 1, last = 0, count = 0, -- key -> its place in the order of commits; place -> key, time
    times = {},
  }, Store)
end

--- Takes the clock of a runtime; called by the app.
---@package
function Store:attach(runtime)
  if not self.own_clock then self.now = runtime.now end
end

local function drop_oldest(self)
  local key = self.order[self.first]
  self.order[self.first], self.times[self.first] = nil, nil
  if key ~= nil and self.done[key] == self.first then
    self.done[key] = nil
    self.count = self.count - 1
  end
  self.first = self.first + 1
end

local function forget_old(self, now)
  while self.first <= self.last and self.times[self.first] <= now do drop_oldest(self) end
end

local function forget_dead_claims(self, now)
  for key, ends in pairs(self.claims) do
    if ends <= now then
      self.claims[key] = nil
      self.running = self.running - 1
    end
  end
end

local function make_room(self, now)
  if self.count + self.running < self.max then return true end
  forget_dead_claims(self, now)
  while self.count + self.running >= self.max and self.count > 0 do
    local before = self.count
    drop_oldest(self)
    self.evicted = self.evicted + before - self.count
  end
  return self.count + self.running < self.max
end

--- Claims a key for `lease` seconds: "new", "running" or "done".
---@param key string
---@param lease number seconds
---@return "new"|"running"|"done"|nil state, moonrabbit.Error?
function Store:begin(key, lease)
  local now = self.now()
  local oldest = self.times[self.first]
  if oldest and oldest <= now then forget_old(self, now) end
  if self.done[key] then return "done" end
  local ends = self.claims[key]
  if ends then
    if ends > now then return "running" end
  else
    if self.count + self.running >= self.max and not make_room(self, now) then
      return nil, errors.new { kind = "overflow",
        message = ("the de-duplication store is full of messages that are being handled (max = %d)"):format(self.max) }
    end
    self.running = self.running + 1
  end
  self.claims[key] = now + lease
  return "new"
end

local function unclaim(self, key)
  if self.claims[key] then
    self.claims[key] = nil
    self.running = self.running - 1
  end
end

--- Remembers a key as done.
---@param key string
---@return true
function Store:commit(key)
  local claims, now = self.claims, self.now()
  if claims[key] then
    claims[key] = nil
    self.running = self.running - 1
  end
  if not self.done[key] then
    if self.count + self.running >= self.max then make_room(self, now) end
    self.count = self.count + 1
  end
  local place = self.last + 1
  self.last = place
  self.done[key], self.order[place], self.times[place] = place, key, now + self.ttl
  return true
end

--- Gives a claim back.
---@param key string
---@return true
function Store:abort(key)
  unclaim(self, key)
  return true
end

--- What it knows, for a store that takes its place (a reload of the script).
---@return table
function Store:state()
  return self
end

--- Goes on in the place of another store, with that one's limits. So a reload keeps this store while messages of the
--- old script are still being handled: what they claim, commit or give up is known to the new one.
---@param other moonrabbit.dedupe.Memory
function Store:take_place_of(other)
  self.ttl, self.max = other.ttl, other.max
end

--- Takes over what another store knew; the age of each key counts on with this one's `ttl` from its commit.
---@param other moonrabbit.dedupe.Memory
function Store:restore(other)
  local shift = self.ttl - other.ttl
  for place = other.first, other.last do
    local key = other.order[place]
    if other.done[key] == place and not self.done[key] then
      self:commit(key)
      self.times[self.last] = other.times[place] + shift
    end
  end
  for key, ends in pairs(other.claims) do
    if not self.claims[key] and not self.done[key] then
      self.claims[key] = ends
      self.running = self.running + 1
    end
  end
end

return memory
