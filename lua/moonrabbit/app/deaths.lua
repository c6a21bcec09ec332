--- What the broker notes on dead letters (`x-death` and the like), kept in one header of our own.
--
-- `moonrabbit-deaths` is a table with the broker's names: `x-death`, a list of what happened, newest first, one entry
-- for each queue and reason with a count; `x-first-death-queue`, `-reason`, `-exchange`, of the first one ever;
-- `x-last-death-*`, of the last. Deaths in the wait queues of our own ladder are retries, and not noted.
-- @module moonrabbit.app.deaths

local core = require "moonrabbit.core"

local deaths = {}

local first = { "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason" }
local last = { "x-last-death-exchange", "x-last-death-queue", "x-last-death-reason" }

--- Every header of the broker's that this is about.
deaths.names = { "x-death" }
for _, names in ipairs { first, last } do
  for _, name in ipairs(names) do deaths.names[#deaths.names + 1] = name end
end

local function is_wait_queue(name, ladder)
  return ladder ~= nil and type(name) == "string" and name:sub(1, #ladder + 6) == ladder .. ".wait."
end

local function same(a, b)
  return a.queue == b.queue and a.reason == b.reason
end

local function find(list, entry)
  for i, each in ipairs(list) do
    if type(each) == "table" and same(each, entry) then return i end
  end
end

-- The entry with the counts of both; the rest is the newer one's.
local function joined(newer, older)
  local both = {}
  for key, value in pairs(newer) do both[key] = value end
  local a, b = tonumber(newer.count), tonumber(older.count)
  if a and b then both.count = a + b end
  return both
end

-- Times are read as numbers; they are to stay times.
local function timed(entry)
  if type(entry.time) ~= "number" then return entry end
  local copy = {}
  for key, value in pairs(entry) do copy[key] = value end
  copy.time = core.types.timestamp(math.floor(entry.time))
  return copy
end

local function merged_list(kept, noted, most, ladder)
  local list = {}
  for _, entry in ipairs(noted) do
    if type(entry) == "table" and not is_wait_queue(entry.queue, ladder) then
      local i = find(kept, entry)
      list[#list + 1] = i and joined(entry, kept[i]) or entry
    end
  end
  for _, entry in ipairs(kept) do
    if type(entry) == "table" and not find(list, entry) then list[#list + 1] = entry end
  end
  for i = #list, 1, -1 do list[i] = i <= most and timed(list[i]) or nil end
  return list
end

-- Three headers that belong together: of the first death the old ones count, of the last the new ones.
local function take_three(to, names, from, ladder)
  if is_wait_queue(from[names[2]], ladder) then return end
  for _, name in ipairs(names) do
    if from[name] ~= nil then to[name] = from[name] end
  end
end

local function as_table(value) return type(value) == "table" and value or {} end

--- Joins what an earlier copy kept (`kept`, or nil) with the headers of a delivery.
---@param kept any            the header moonrabbit-deaths
---@param all table           the headers
---@param most integer        how many entries of the list are kept; 0: nothing is
---@param ladder string?      our own
---@return table? moved       the new moonrabbit-deaths; nil: nothing is worth keeping
---@return boolean any        whether the delivery has such headers at all, or `most` leaves out what was kept
function deaths.merge(kept, all, most, ladder)
  local any = false
  for _, name in ipairs(deaths.names) do any = any or all[name] ~= nil end
  if not any then return nil, kept ~= nil and most == 0 end
  if most == 0 then return nil, true end
  kept = as_table(kept)
  local moved = {}
  take_three(moved, first, all, ladder)
  if kept[first[2]] ~= nil then take_three(moved, first, kept) end
  take_three(moved, last, kept)
  take_three(moved, last, all, ladder)
  local list = merged_list(as_table(kept["x-death"]), as_table(all["x-death"]), most, ladder)
  if #list > 0 then moved["x-death"] = list end
  if next(moved) == nil then return nil, true end
  return moved, true
end

return deaths
