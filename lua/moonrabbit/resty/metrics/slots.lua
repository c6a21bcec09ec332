--- The dictionary in which the workers of one nginx leave their metrics for one another.
--
-- Each worker that ever began has a slot of its own there, with its page and what it lacks to be ready. When its process
-- is gone, its counters and histograms are added to what all have left before, so a sum never falls, over reloads and
-- crashes; its gauges vanish. Who looks into the slots holds a lock, for as long as it takes to copy them; a worker that
-- dies with it loses it after some seconds.
--
-- A dictionary that is full keeps what it has, and takes the rest when there is room again: workers go on counting.
-- Until then no sum is made, for it would lack something.
-- @module moonrabbit.resty.metrics.slots

local ffi = require "ffi"
local runtime = require "moonrabbit.runtime.resty"
local sum = require "moonrabbit.metrics.sum"

pcall(ffi.cdef, "int getpgid(int pid);")

-- Seconds after which the lock of a process that died is void, that somebody waits for it, and between tries.
local LOCK, PATIENCE, TRY = 5, 2, 0.002

local PREFIX = "moonrabbit:"

-- Instead of what a worker lacks: no requests come to one that leaves. And instead of a process, in a slot given up.
local LEAVING, GONE = "leaving", "gone"

---@class moonrabbit.resty.metrics.Slots
local Slots = { LEAVING = LEAVING }
Slots.__index = Slots

-- ---- The dictionary ---------------------------------------------------------------------------------

local function get(self, name) return self.dict:get(PREFIX .. name) end

local function delete(self, name) self.dict:delete(PREFIX .. name) end

local function too_small(self, problem)
  return ("the dictionary '%s' is too small for what is measured (%s): make its `lua_shared_dict` larger"):format(
    self.name, tostring(problem))
end

-- Told once, until all is well again.
local function complain(self, problem)
  if self.said == problem then return end
  self.said = problem
  runtime.log("error", "metrics: " .. too_small(self, problem))
end

-- nginx drops what was there before it finds that the new value does not fit.
local function set(self, name, value)
  local before = get(self, name)
  local ok, problem = self.dict:safe_set(PREFIX .. name, value)
  if ok then return true end
  if before ~= nil then self.dict:safe_set(PREFIX .. name, before) end
  complain(self, problem)
  return false
end

local function lock(self)
  local until_then = runtime.now() + PATIENCE
  repeat
    local ok, problem = self.dict:safe_add(PREFIX .. "lock", 1, LOCK)
    if ok then return true end
    if problem ~= "exists" then return nil, too_small(self, problem) end
    runtime.sleep(TRY)
  until runtime.now() > until_then
  return nil, "the lock of the metrics is held"
end

-- ---- A worker's own slot ----------------------------------------------------------------------------

-- What is written later is not longer than what holds its place here, but for the page. The process comes last: with it
-- the others know of the slot.
local function take_slot(self)
  local slot = self.number
  if not slot then
    local _, full = self.dict:safe_add(PREFIX .. "slots", 0)
    slot = self.dict:incr(PREFIX .. "slots", 1)
    if not slot then return complain(self, full) end
    self.number = slot
  end
  if set(self, "missing:" .. slot, "worker\tit has not started\n") and set(self, "short:" .. slot, false)
    and set(self, "pid:" .. slot, ("%d %d"):format(ngx.worker.pid(), ngx.worker.id() or 0)) then
    self.slot = slot
  end
end

--- The slots in a dictionary, with one for this worker.
---@param name string of the `lua_shared_dict`
---@return moonrabbit.resty.metrics.Slots
function Slots.open(name)
  local self = setmetatable({ name = name, dict = ngx.shared[name], group = ffi.C.getpgid(0) }, Slots)
  take_slot(self)
  return self
end

--- Puts into this worker's slot what it has measured and what it lacks.
---@param page string
---@param lacks string a line for each: name, tab, reason; or LEAVING
---@return boolean whole
function Slots:put(page, lacks)
  if not self.slot then take_slot(self) end
  local slot = self.slot
  if not slot then return false end
  local whole = set(self, "page:" .. slot, page)
  set(self, "short:" .. slot, not whole)
  whole = set(self, "missing:" .. slot, lacks) and whole
  if whole then self.said = nil end
  return whole
end

-- ---- The slots of all -------------------------------------------------------------------------------

-- Whether a process is a worker of this nginx still; its number may have gone to another one since.
local function is_alive(self, pid) return ffi.C.getpgid(pid) == self.group end

-- What a worker that is gone has left is kept before its slot is given up: twice is better than never. Returns what
-- could not be kept.
local function bury(self, slot)
  local page = get(self, "page:" .. slot)
  local rest = page and sum.lasting(page)
  if rest and not set(self, "left", sum.sum { get(self, "left") or "", rest }) then return rest end
  set(self, "pid:" .. slot, GONE)
  for _, name in ipairs { "page:", "missing:", "short:" } do delete(self, name .. slot) end
end

-- Slots that were given up are not looked at any more. One without a process is just being taken.
local function advance(self, first, last)
  local before = first
  while first <= last and get(self, "pid:" .. first) == GONE do
    delete(self, "pid:" .. first)
    first = first + 1
  end
  if first > before then set(self, "first", first) end
end

-- Calls fn(slot, number of the worker) for each worker that lives. The pages that the others have left.
local function walk(self, fn)
  local first, last = get(self, "first") or 1, get(self, "slots") or 0
  local left = {}
  for slot = first, last do
    local pid, number = (get(self, "pid:" .. slot) or ""):match "^(%d+) (%d+)$"
    if pid and is_alive(self, tonumber(pid)) then
      fn(slot, tonumber(number))
    elseif pid then
      left[#left + 1] = bury(self, slot)
    end
  end
  advance(self, first, last)
  left[#left + 1] = get(self, "left")
  return left
end

local function each_worker(self, fn)
  if not self.slot then return nil, too_small(self, self.said) end
  local ok, problem = lock(self)
  if not ok then return nil, problem end
  local left = walk(self, fn)
  delete(self, "lock")
  return left
end

--- What is to be added up: the pages of the workers that live, and of those that have left. It waits.
---@return string[]|nil pages, string? problem
function Slots:pages()
  local living, short = {}, false
  local pages, problem = each_worker(self, function(slot)
    living[#living + 1] = get(self, "page:" .. slot)
    short = short or get(self, "short:" .. slot)
  end)
  if not pages then return nil, problem end
  if short then return nil, too_small(self, "the newest page of a worker is not in it") end
  for _, page in ipairs(living) do pages[#pages + 1] = page end
  return pages
end

--- What the workers that live lack: fn(number of the worker, lines). It waits.
---@param fn fun(number: integer, lines: string)
---@return boolean|nil ok, string? problem
function Slots:lacks(fn)
  local ok, problem = each_worker(self, function(slot, number)
    local lines = get(self, "missing:" .. slot)
    if lines and lines ~= LEAVING then fn(number, lines) end
  end)
  return ok and true, problem
end

return Slots
