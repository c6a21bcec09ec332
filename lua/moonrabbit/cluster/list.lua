--- The modes "direct" and "proxy": the listed targets, in their order or shuffled in every round. A balancer is one
-- target, tried again and again.
-- @module moonrabbit.cluster.list

local random = require "moonrabbit.random"
local targets = require "moonrabbit.cluster.targets"

---@class moonrabbit.cluster.List
local List = {}
List.__index = List

---@param listed table[]
---@param opts { shuffle: boolean?, dns: table? }
---@param context table { runtime, log, past }
function List.new(listed, opts, context)
  return setmetatable({
    targets = listed, shuffle = opts.shuffle, silent = context.past and context.past.silent,
    context = { runtime = context.runtime, log = context.log, dns = opts.dns },
  }, List)
end

-- As in moonrabbit.endpoints: one that is silent goes last. Services of DNS make other tables for each round.
local function silent_last(self, all)
  local list, silent = {}, {}
  for _, target in ipairs(all) do
    local one_of = targets.key(target) == self.silent and silent or list
    one_of[#one_of + 1] = target
  end
  for _, target in ipairs(silent) do list[#list + 1] = target end
  return list
end

function List:round()
  local all, err = targets.expand(self.targets, self.context)
  if not all then return nil, err end
  self.partial = err ~= nil and err.temporary
  if self.shuffle then
    local copy = {}
    for i, target in ipairs(all) do copy[i] = target end
    all = random.shuffle(copy)
  end
  return silent_last(self, all)
end

function List:failed(target, err)
  self.silent = err.kind == "timeout" and targets.key(target) or self.silent
  if self.partial then err.temporary = true end
end

function List:lost(target, err) self.silent = err.kind == "timeout" and targets.key(target) or nil end
function List:connected() self.silent = nil end
function List.attach() end
function List.close() end

return List
