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
---@param context table { runtime, log }
function List.new(listed, opts, context)
  return setmetatable({
    targets = listed, shuffle = opts.shuffle,
    context = { runtime = context.runtime, log = context.log, dns = opts.dns },
  }, List)
end

function List:round()
  local all, err = targets.expand(self.targets, self.context)
  if not all or not self.shuffle then return all, err end
  local copy = {}
  for i, target in ipairs(all) do copy[i] = target end
  return random.shuffle(copy)
end

function List.attach() end
function List.failed() end
function List.connected() end
function List.lost() end
function List.close() end

return List
