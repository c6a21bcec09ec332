--- The shop's things in the broker: whether we may make them, what is left in them, and away with them.
local ladder = require "moonrabbit.app.ladder"

local queues = {}

local apps = { "orders", "payments", "mail" }

-- The delays that the scripts' policies ask for.
local delays = { 0.5, 1, 2, 4, 5 }

local function steps(name)
  local list, rungs = {}, ladder.new(name)
  for _, delay in ipairs(delays) do list[#list + 1] = rungs:wait_name(rungs:step(delay)) end
  return list
end

--- The queue, or the dead letters, of an app.
function queues.of(name, app) return name .. "." .. app end
function queues.dead(name, app) return name .. "." .. app .. ".dead" end

--- Whether this user may do what the shop does: true, or nil and what to do about it.
function queues.check(conn, name)
  local ch, err = conn:channel { confirm = true }
  if not ch then return nil, tostring(err) end
  local check = name .. ".check"
  local ok
  ok, err = ch:exchange_declare(check, { type = "direct", durable = true })
  if ok then ok, err = ch:queue_declare(check, { exclusive = true }) end
  if ok then ok, err = ch:queue_bind(check, check, "check") end
  if ok then ok, err = ch:publish("check", { exchange = check, routing_key = "check", timeout = 10 }) end
  if ch:is_open() then
    ch:queue_delete(check)
    ch:exchange_delete(check)
    ch:close()
  end
  if ok then return true end
  if err.code == 403 then
    return nil, ("%s\n  This user needs the rights to configure, write and read what is called %s and %s.*"):format(
      tostring(err), name, name)
  end
  if err.kind == "blocked" or err.kind == "timeout" then
    return nil, ("%s\n  The broker takes no messages: is it short of memory or disk?"):format(tostring(err))
  end
  return nil, tostring(err)
end

-- How many messages a queue holds; 0 where there is none; nil when the broker does not say. A channel for each: the
-- broker closes it where there is none.
local function depth(conn, queue)
  local ch = conn:channel()
  if not ch then return nil end
  local found, err = ch:queue_declare(queue, { passive = true })
  if ch:is_open() then ch:close() end
  if found then return found.message_count end
  return err.code == 404 and 0 or nil
end

local function sum(conn, list)
  local total = 0
  for _, queue in ipairs(list) do
    local n = depth(conn, queue)
    if not n then return nil end
    total = total + n
  end
  return total
end

--- How many messages wait in the shop's queues, those that are dead apart: in the apps' own, on the ladder, and
-- among those whose home is gone. nil: the broker does not say.
function queues.waiting(conn, name)
  local list = steps(name)
  list[#list + 1] = name .. ".orphans"
  for _, app in ipairs(apps) do list[#list + 1] = queues.of(name, app) end
  return sum(conn, list)
end

--- How many dead letters there are. nil: the broker does not say.
function queues.dead_letters(conn, name)
  local list = {}
  for i, app in ipairs(apps) do list[i] = queues.dead(name, app) end
  return sum(conn, list)
end

--- The orders among the dead letters of an app, by number; they stay there.
function queues.parked(conn, name, app)
  local set, queue = {}, queues.dead(name, app)
  if (depth(conn, queue) or 0) == 0 then return set end
  local ch = conn:channel()
  local msg = ch and ch:get(queue)
  while msg do
    set[tostring(msg.message_id)] = true
    msg = ch:get(queue)
  end
  if ch and ch:is_open() then ch:close() end -- what was looked at goes back
  return set
end

--- Takes everything away that the shop has made.
function queues.clean(conn, name)
  local ch = conn:channel()
  if not ch then return end
  local list = steps(name)
  for _, step in ipairs(list) do ch:exchange_delete(step) end
  for _, app in ipairs(apps) do
    list[#list + 1] = queues.of(name, app)
    list[#list + 1] = queues.dead(name, app)
  end
  list[#list + 1] = name .. ".orphans"
  for _, queue in ipairs(list) do ch:queue_delete(queue) end
  for _, exchange in ipairs { name .. ".home", name .. ".orphans", name } do ch:exchange_delete(exchange) end
  if ch:is_open() then ch:close() end
end

return queues
