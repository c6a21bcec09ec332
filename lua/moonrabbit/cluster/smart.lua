--- The mode "smart": starts from the listed targets, learns the other nodes of the cluster and the leader of a queue
-- from the management API, tries the leader's node first and leaves nodes that failed alone for a while.
--
-- What cannot be learned (the API is missing, forbidden, slow or lying) is said once, and the connection goes on
-- with what is known. A learned node gets the credentials and the kind of transport of the first listed target, so
-- none is ever reached without TLS when that one has it.
-- @module moonrabbit.cluster.smart

local described = require "moonrabbit.described"
local management = require "moonrabbit.management"
local options = require "moonrabbit.options"
local protect = require "moonrabbit.protect"
local Quarantine = require "moonrabbit.cluster.quarantine"
local discovery = require "moonrabbit.cluster.discovery"
local random = require "moonrabbit.random"
local targets = require "moonrabbit.cluster.targets"

---@class moonrabbit.cluster.Smart
local Smart = {}
Smart.__index = Smart

local API_TIMEOUT = 3

-- ---- The management APIs ----------------------------------------------------------------------------

-- The API of a node whose target is known: where RabbitMQ has it unless it is told otherwise.
local function usual_api(self, target)
  if not target.host then return nil end
  local host = target.host:find(":", 1, true) and "[" .. target.host .. "]" or target.host
  local opts = { user = target.user, password = target.password, timeout = API_TIMEOUT, runtime = self.runtime }
  if target.tls then
    opts.uri, opts.tls = "https://" .. host .. ":15671", target.tls
  else
    opts.uri = "http://" .. host .. ":15672"
  end
  return management.new(opts)
end

-- The API of a node that another node's API told of, with the same credentials and security.
local function told_api(api, where)
  local copy = setmetatable({}, getmetatable(api))
  for name, value in pairs(api) do copy[name] = value end
  copy._host, copy._port = where.host, where.port
  copy.endpoint = (where.host:find(":", 1, true) and "[" .. where.host .. "]" or where.host) .. ":" .. where.port
  if api._tls then
    copy._tls = {}
    for name, value in pairs(api._tls) do copy._tls[name] = value end
    if copy._tls.server_name == api._host then copy._tls.server_name = where.host end
  end
  return copy
end

-- All there are, the one that answered last first.
local function apis(self, listed)
  local list, seen = {}, {}
  local function add(api)
    if api and not seen[api.endpoint] then
      seen[api.endpoint] = true
      list[#list + 1] = api
    end
  end
  add(self.good)
  if self.given then
    for _, api in ipairs(self.given) do add(api) end
  else
    for _, target in ipairs(listed) do add(usual_api(self, target)) end
  end
  local origin = self.good or list[1]
  for _, node in pairs(origin and self.nodes or {}) do
    local where = node.addresses[origin._tls and "https" or "http"]
    if node.running and where then add(told_api(origin, where)) end
  end
  return list
end

-- ---- Learning ---------------------------------------------------------------------------------------

-- Says what could not be learned, once for each reason.
local function unknown(self, what, err)
  local text = what .. ": " .. tostring(err)
  if self.said[what] == text then return end
  self.said[what] = text
  self.log("warn", text .. "; going on with what is known")
  self.emit("cluster", "unknown", { what = what, err = err })
end

local function known_again(self, what) self.said[what] = nil end

local NODES = "the nodes of the cluster cannot be learned"
local LEADER = "the leader of the queue cannot be learned"

local function sorted_names(nodes)
  local names = {}
  for name in pairs(nodes) do names[#names + 1] = name end
  table.sort(names)
  return names
end

-- What has come and what has gone.
local function tell_changes(self, before, after)
  for _, name in ipairs(sorted_names(after)) do
    if not before[name] then
      self.log("info", "node " .. name .. " is part of the cluster")
      self.emit("cluster", "node_found", { node = name })
    end
  end
  for _, name in ipairs(sorted_names(before)) do
    if not after[name] then
      self.log("info", "node " .. name .. " is no more part of the cluster")
      self.emit("cluster", "node_gone", { node = name })
    end
  end
end

local function learn_nodes(self, api)
  local overview, err = api:overview()
  if not overview then return nil, err end
  local nodes
  nodes, err = api:nodes()
  if not nodes then return nil, err end
  local found = discovery.nodes(overview, nodes, api._host, self.address)
  if next(found) == nil then return nil, "the management API of " .. api.endpoint .. " names no node" end
  tell_changes(self, self.nodes, found)
  self.nodes = found
  known_again(self, NODES)
  return true
end

local function learn_leader(self, api)
  local found, err = api:leader(self.vhost, self.near)
  if not found then return nil, err end
  local before = self.leader
  self.leader, self.members = found.leader, {}
  for _, name in ipairs(found.in_sync) do self.members[name] = true end
  if before and found.leader and before ~= found.leader then
    self.log("info", ("the leader of queue '%s' is now %s"):format(self.near, found.leader))
    self.emit("cluster", "leader_moved", { queue = self.near, node = found.leader, from = before })
  end
  known_again(self, LEADER)
  return true
end

-- Whether another node's API could answer what this one did not.
local function elsewhere(err)
  return type(err) ~= "table" or not (err.kind == "auth" or err.code == 404)
end

-- Learns from one API: why not the nodes, and why not the leader, or what was known of that before where it is not asked.
local function ask(self, api, before)
  local learned, err = true, nil
  if self.discover then learned, err = learn_nodes(self, api) end
  if learned then err = nil end
  if not self.near or err and elsewhere(err) then return err, before end
  local leads, why = learn_leader(self, api)
  return err, not leads and why or nil
end

local function learn(self)
  local listed = targets.expand(self.targets, self.context) or {}
  local learned, nodes_err, leader_err = false, nil, nil
  for _, api in ipairs(apis(self, listed)) do
    if self.closed then return end
    local err, why = ask(self, api, leader_err)
    learned = learned or not err
    nodes_err, leader_err = not learned and (nodes_err or err) or nil, why
    if not err and not why then self.good = api end
    if not (err and elsewhere(err) or why and elsewhere(why)) then break end
  end
  if nodes_err then unknown(self, NODES, nodes_err) end
  if self.near and (leader_err or nodes_err and elsewhere(nodes_err)) then
    unknown(self, LEADER, leader_err or nodes_err)
  end
end

-- Whether the leader's node would be tried, and first.
local function leader_is_free(self)
  local node, first = self.nodes[self.leader], self.targets[1]
  if not node or not node.running then return false end
  local key, where = self.keys[self.leader], node.addresses[first.tls and "tls" or "plain"]
  if not key and where then key = targets.key(targets.at(first, where.host, where.port)) end
  return key ~= nil and self.quarantine:left(key, self.runtime.now()) == 0
end

-- The queue's leader is on another node than this connection, for the second time in a row: it moves there.
local function follow(self)
  local here = self.follow and self.leader and self.current and self:node_of(self.current)
  if not here or here == self.leader or not leader_is_free(self) then
    self.away = nil
  elseif self.away == self.leader then
    self.away = nil
    self.move(("queue '%s' is led by %s"):format(self.near, self.leader))
  else
    self.away = self.leader
  end
end

--- Learns anew, in a task; one at a time.
function Smart:refresh()
  if self.learning or self.closed then return end
  self.learning = self.runtime.spawn(function()
    local whole, err = protect(learn, self)
    self.learning = nil
    self.learned:broadcast()
    if not whole and err == self.runtime.cancelled then error(err, 0) end
    if not whole then unknown(self, NODES, described(err)) end -- a library is missing, or a function of the user's threw
    if not self.closed then follow(self) end
  end)
end

local function keep_learning(self)
  while not self.closed do
    self.closing:wait(self.every)
    if not self.closed then self:refresh() end
  end
end

-- ---- Rounds -----------------------------------------------------------------------------------------

-- The node that a target is, by name; nil while that is not known.
function Smart:node_of(target)
  if target.node then return target.node end
  for name, node in pairs(self.nodes) do
    if discovery.same(target, node.addresses[target.tls and "tls" or "plain"], name) then return name end
  end
end

-- The listed targets and those of learned nodes that none of them is.
local function everyone(self, listed)
  local all, nodes, keys = {}, {}, {}
  local function add(target, name)
    local key = targets.key(target)
    if not keys[key] then
      keys[key] = true
      all[#all + 1] = { target = target, key = key, node = name }
      if name then nodes[name] = nodes[name] or key end
    end
  end
  for _, target in ipairs(listed) do add(target, self:node_of(target)) end
  local template = self.targets[1]
  for _, name in ipairs(sorted_names(self.nodes)) do
    local where = self.nodes[name].addresses[template.tls and "tls" or "plain"]
    if where and not nodes[name] then
      local target = targets.at(template, where.host, where.port)
      target.node = name
      add(target, name)
    end
  end
  return all, keys, nodes
end

--- The listed targets and the learned ones, for who looks whether the cluster is there.
---@return table[]
function Smart:known()
  local list = {}
  for i, each in ipairs((everyone(self, self.targets))) do list[i] = each.target end
  return list
end

-- The smaller, the sooner it is tried.
local function rank(self, name)
  local node = name and self.nodes[name]
  if node and not node.running then return 4 end
  if not self.near or not self.leader then return 2 end
  if name == self.leader then return 0 end
  if name and self.members[name] then return 1 end
  return 2
end

local function in_order(self, all)
  local now = self.runtime.now()
  if self.shuffle then random.shuffle(all) end
  local free, held = {}, {}
  for i, each in ipairs(all) do
    each.at, each.rank, each.left = i, rank(self, each.node), self.quarantine:left(each.key, now)
    table.insert(each.left > 0 and held or free, each)
  end
  local list, by = free, "rank"
  if #free == 0 then list, by = held, "left" end -- rather one of those than none
  self.partial = self.partial or #list < #all
  table.sort(list, function(a, b)
    if a[by] ~= b[by] then return a[by] < b[by] end
    return a.at < b.at
  end)
  for i, each in ipairs(list) do list[i] = each.target end
  return list
end

function Smart:round()
  local listed, err = targets.expand(self.targets, self.context)
  self:refresh()
  if self.learning and self.near then
    local deadline = self.runtime.now() + self.wait
    while self.learning and self.runtime.now() < deadline do
      self.learned:wait(math.max(0, deadline - self.runtime.now()))
    end
  end
  local all, keys, nodes = everyone(self, listed or {})
  self.quarantine:keep(keys)
  self.keys = nodes
  if #all == 0 then return nil, err end
  self.partial = err ~= nil and err.temporary
  return in_order(self, all)
end

function Smart:failed(target, err)
  local time = self.quarantine:failed(targets.key(target), self.runtime.now())
  self.log("debug", ("%s failed (%s): left alone for %g s"):format(targets.key(target), tostring(err.kind), time))
  self.emit("cluster", "quarantined", { endpoint = targets.key(target), seconds = time, err = err })
  if self.partial then err.temporary = true end -- those that are left alone may take us
end

function Smart:connected(target)
  self.quarantine:connected(targets.key(target), self.runtime.now())
  self.current = target
end

function Smart:lost(target)
  self.quarantine:lost(targets.key(target), self.runtime.now())
  self.current = nil
end

function Smart:close()
  self.closed = true
  if self.learning then self.runtime.cancel(self.learning) end
  self.closing:broadcast()
end

--- The connection that it serves.
function Smart:attach(hooks)
  self.emit, self.move = hooks.emit, hooks.move
  if self.every > 0 then self.runtime.spawn(keep_learning, self) end
end

local function given_apis(given, listed, context, level)
  if given == nil then return nil end
  if type(given) == "string" or given[1] == nil then given = { given } end
  if not options.is_list(given) then error("connect: option 'management': a list without gaps expected", level + 1) end
  local list = {}
  for i, one in ipairs(given) do
    if type(one) ~= "string" and type(one) ~= "table" then
      error("connect: option 'management' must be an address, a table of options, or a list of these", level + 1)
    end
    local opts = type(one) == "string" and { uri = one } or one
    local copy = { runtime = context.runtime, timeout = API_TIMEOUT }
    for name, value in pairs(opts) do copy[name] = value end
    local address = management.parse(copy.uri or "")
    if not (address and address.user) and copy.user == nil and copy.token == nil then
      copy.user, copy.password = listed[1].user, listed[1].password
    end
    list[i] = management.new(copy, level + 1)
  end
  return list
end

---@param listed table[]
---@param opts table    checked options of the connection: near, management, smart, shuffle, dns
---@param context table { runtime, log, past }
---@param level integer   of the caller, for errors
function Smart.new(listed, opts, context, level)
  local tuning = opts.smart or {}
  local past = context.past or {}
  local runtime = context.runtime
  return setmetatable({
    runtime = runtime, log = context.log, targets = listed, vhost = listed[1].vhost, near = opts.near,
    shuffle = opts.shuffle, given = given_apis(opts.management, listed, context, level + 1),
    discover = tuning.discover ~= false, follow = tuning.follow, address = tuning.address,
    every = tuning.refresh or 30, wait = tuning.wait or 1,
    quarantine = past.quarantine or Quarantine.new(tuning.quarantine),
    context = { runtime = runtime, log = context.log, dns = opts.dns },
    nodes = past.nodes or {}, keys = {}, leader = past.leader, members = past.members or {}, said = past.said or {},
    learned = runtime.condition(), closing = runtime.condition(),
    emit = function() end, move = function() end,
  }, Smart)
end

return Smart
