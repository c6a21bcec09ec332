--- Connecting: the name is looked up, then each of its addresses is tried in turn, all within one
--- timeout. An address may use its share of what is left of it, so that one that does not answer
--- leaves time for the others.
--
-- Made for whatever waits for descriptors (shared/descriptors.lua), and its transports.

local net = require "moonrabbit.net"
local describe = require "moonrabbit.runtime.shared.describe"

local now = net.now

--- How far an attempt came: of several failures the one that came farthest tells what is wrong.
local PROGRESS = { refused = 1, timeout = 2, closed = 3, tls = 4 }

--- Contexts with the system's authorities cost milliseconds and a megabyte: they are kept. Those
--- with files of the user's are made anew, for the files may have been renewed.
local contexts = {}

local function context_for(options)
  if not options then return nil end
  if options.ca or options.cert or options.key then return net.tls(options) end
  local key = tostring(options.verify) .. tostring(options.min_version)
  local context, text = contexts[key], nil
  if not context then
    context, text = net.tls(options)
    contexts[key] = context
  end
  return context, text
end

local function is_address(host)
  return host == "localhost" or host:find(":", 1, true) ~= nil or not host:find "[^%d.]"
end

local function share(deadline, left)
  if not deadline then return nil end
  local time = now()
  return time + (deadline - time) / left
end

--- "cannot connect to NAME: ADDRESS: REASON; ADDRESS: REASON", the name not said twice.
local function failure(name, reasons)
  local text = table.concat(reasons, "; ")
  local repeated = name .. ": "
  if text:sub(1, #repeated) == repeated then text = text:sub(#repeated + 1) end
  return "cannot connect to " .. name .. ": " .. text
end

local M = {}

--- The function `open` of a runtime.
---@param descriptors table
---@param new_transport function
---@param cancelled table what a cancelled task throws
---@param own_look_up (fun(by_system: function): function)? gives what looks names up in the loop's own way:
--- looks names up in the loop's own way
function M.of(descriptors, new_transport, cancelled, own_look_up)
  local watch_fd, wait, unwatch = descriptors.watch, descriptors.wait, descriptors.unwatch

  --- Waits; closes the descriptor's owner first when the task is cancelled.
  local function wait_or_close(watch, owner, events, deadline)
    local ready, given_up = wait(watch, events, deadline, true)
    if given_up then
      unwatch(watch)
      owner:close()
      error(cancelled, 0)
    end
    return ready
  end

  local function resolve(host, port, deadline)
    local resolver, text, temporary = net.resolve(host, port)
    if not resolver then return nil, "dns", text, temporary end
    local addresses, why, watch
    addresses, why, text, temporary = resolver:result()
    if not addresses and why == "again" then
      watch, text = watch_fd(resolver:fd())
      if not watch then
        resolver:close()
        return nil, "refused", text, true
      end
      local ready = wait_or_close(watch, resolver, "r", deadline)
      unwatch(watch)
      if ready then
        addresses, why, text, temporary = resolver:result()
      else
        why, text, temporary = "timeout", "no answer of the resolver in time", true
      end
    end
    resolver:close()
    return addresses, why, text, temporary
  end

  --- nil, "timeout" at the deadline.
  local function handshake(stream, watch, deadline)
    while true do
      local done, kind, text, temporary = stream:handshake()
      if done or kind ~= "again" then return done, kind, text, temporary end
      if wait_or_close(watch, stream, stream:wants(), deadline) == false then
        return nil, "timeout", nil, true
      end
    end
  end

  local function attempt(address, context, server_name, deadline)
    local stream, kind, text, temporary = net.connect(address, context, server_name)
    if not stream then return nil, kind, text, temporary end
    local watch, done
    watch, text = watch_fd(stream:fd())
    if not watch then
      stream:close()
      return nil, "refused", text, true
    end
    done, kind, text, temporary = handshake(stream, watch, deadline)
    if done then return new_transport(stream, watch) end
    if kind == "timeout" and not text then
      text = tostring(address) .. ": no answer in time" .. (context and " (connect, TLS handshake)" or "")
    end
    unwatch(watch)
    stream:close()
    return nil, kind, text, temporary
  end

  local function try_each(addresses, context, server_name, deadline)
    local reasons, kind, temporary = {}, nil, nil
    for i, address in ipairs(addresses) do
      local stream, why, text, again =
        attempt(address, context, server_name, share(deadline, #addresses - i + 1))
      if stream then return stream end
      reasons[i] = text
      if not kind or (PROGRESS[why] or 0) > PROGRESS[kind] then
        kind, temporary = why, again
      end
    end
    return nil, kind, reasons, temporary
  end

  local look_up = own_look_up and own_look_up(resolve) or resolve

  local function find_addresses(host, port, deadline)
    return (is_address(host) and resolve or look_up)(host, port, deadline)
  end

  --- See docs/internals.md.
  ---@param endpoint { host: string?, port: integer?, path: string? }
  ---@param tls table? options of net.tls, and server_name
  ---@param timeout number? seconds, for everything
  return function(endpoint, tls, timeout)
    local deadline = timeout and now() + timeout
    local name = describe(endpoint)
    local context, text = context_for(tls)
    if tls and not context then return nil, "tls", text, false end
    local addresses, kind, temporary
    if endpoint.path then
      addresses, kind, text, temporary = net.unix(endpoint.path)
      addresses = addresses and { addresses }
    else
      addresses, kind, text, temporary = find_addresses(endpoint.host, endpoint.port, deadline)
    end
    if not addresses then return nil, kind, failure(name, { text }), temporary end
    local server_name = tls and (tls.server_name or endpoint.host)
    local stream, why, reasons, again = try_each(addresses, context, server_name or nil, deadline)
    if stream then return stream end
    return nil, why, failure(name, reasons), again
  end
end

return M
