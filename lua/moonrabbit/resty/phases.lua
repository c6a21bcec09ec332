--- What may be called in which phase of nginx; what may not throws, and says what to call instead.
-- @module moonrabbit.resty.phases

local phases = {}

-- Those in which ngx_lua lets a semaphore be waited for and a cosocket be used.
local waits = { rewrite = true, server_rewrite = true, access = true, content = true, timer = true, ssl_cert = true,
  ssl_client_hello = true, ssl_session_fetch = true }

local names = {
  set = "set_by_lua*", header_filter = "header_filter_by_lua*", body_filter = "body_filter_by_lua*",
  log = "log_by_lua*", balancer = "balancer_by_lua*", init = "init_by_lua*", init_worker = "init_worker_by_lua*",
  exit_worker = "exit_worker_by_lua*", rewrite = "rewrite_by_lua*", access = "access_by_lua*",
  content = "content_by_lua*", timer = "a timer", ssl_cert = "ssl_certificate_by_lua*",
  ssl_session_store = "ssl_session_store_by_lua*",
}

--- The name of the phase as nginx's directives have it.
function phases.current()
  local phase = ngx.get_phase()
  return names[phase] or phase
end

--- Throws where nothing can be waited for.
---@param what string  who asks
---@param instead string? what can be called there
---@param level integer?
function phases.check_waiting(what, instead, level)
  if waits[ngx.get_phase()] then return end
  error(("%s waits, which is impossible in %s: call it in rewrite, access or content phases or in a timer%s"):format(
    what, phases.current(), instead and ("; " .. instead) or ""), (level or 2) + 1)
end

--- Throws anywhere but in init_worker_by_lua*.
function phases.check_init_worker(what, level)
  if ngx.get_phase() == "init_worker" then return end
  error(("%s belongs into init_worker_by_lua*, and was called in %s"):format(what, phases.current()), (level or 2) + 1)
end

return phases
